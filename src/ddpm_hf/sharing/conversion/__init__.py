"""Other people's models, with outputs proven equal."""
