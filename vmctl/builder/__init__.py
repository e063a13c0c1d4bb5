"""Builds disk images from recipes: no root, no mount, and the same bytes from the same inputs."""
