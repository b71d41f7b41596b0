"""The Recurrent Attention Model of Mnih et al. 2014 (arXiv 1406.6247): model, losses, data and a trainer of many seeds at once."""
