"""The Recurrent Attention Model of Mnih et al. 2014 (arXiv 1406.6247): data, model, losses, trainer."""
