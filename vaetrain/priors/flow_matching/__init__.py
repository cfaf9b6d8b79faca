"""Flow matching on latents: a prior that is trained as the model itself is."""
