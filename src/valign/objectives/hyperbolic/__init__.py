"""Losses of image-text models that know unsafe content: hyperbolic entailment, and the redirection it is compared with."""
