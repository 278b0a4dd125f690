"""One mixture-of-experts model of a stock class from several dense models."""
