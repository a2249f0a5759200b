"""Bundles behind HTTP, on Ray, in Triton, and over tables of prompts."""
