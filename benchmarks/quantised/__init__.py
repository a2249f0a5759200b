"""What each scheme of quantisation does to guidance and pictures, and what it saves."""
