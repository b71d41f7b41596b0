"""What a study's tracked records say: which hyperparameters matter, by how much, and how sure that is."""
