"""Measure the ranges of activations, for schemes of quantisation that want them fixed."""
