"""A self-contained demo, which needs no download: fictional authors, and small models that know them."""
