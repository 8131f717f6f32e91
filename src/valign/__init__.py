"""valign: one policy for a generative image model, enforced in training, enforced at inference, and measured."""

from valign.moved import install

__version__ = "0.1.0"

install()
