"""The two models of DALL-E: the discrete VAE and the autoregressive transformer."""
