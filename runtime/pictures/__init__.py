"""From latents to pictures, and what is kept with them."""
