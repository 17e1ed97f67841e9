"""Converting other people's models, with outputs verified equal."""
