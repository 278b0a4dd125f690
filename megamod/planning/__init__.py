"""Plans of a run before it starts: parameters, memory, communication, time, fitting settings."""
