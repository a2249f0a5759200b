"""What only a GPU can show, item by item: every result is a line on the disk as soon as it is known."""
