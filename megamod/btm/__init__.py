"""Branch-Train-Merge: new experts from old ones, and a driver that grows a whole forest."""
