"""Clothes told apart by attention to a memory of 60,000 images in a learnt latent space."""
