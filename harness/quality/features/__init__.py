"""What people look at: for each latent of an SAE its statistics, its examples on a text, and its neighbours."""
