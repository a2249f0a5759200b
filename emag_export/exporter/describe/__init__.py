"""Say which bundle a model and options make, before anything is made."""
