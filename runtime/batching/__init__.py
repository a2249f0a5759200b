"""Images of many requests in the same engine calls: they join and leave between steps."""
