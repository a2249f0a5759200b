"""What every guidance does to the pictures of the embedded models, and at what cost (``make eval``)."""
