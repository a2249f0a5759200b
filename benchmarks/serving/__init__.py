"""Load on servers: measured here, and extrapolated to other machines."""
