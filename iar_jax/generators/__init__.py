"""How codes are modelled: one folder for each kind of generator, with its network, its loss and its sampler."""
