"""What is measured of pictures: one file per metric."""
