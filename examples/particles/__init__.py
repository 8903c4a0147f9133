"""Energies and forces of clusters of particles, learnt from a simulation by equivariant attention."""
