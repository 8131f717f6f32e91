"""Every method on the shapes world, over several seeds, in one report."""
