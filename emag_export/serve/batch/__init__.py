"""Tables of prompts to thousands of pictures."""
