"""Engines that cut weights and optimizer states into pieces: how a model reaches them, and comes back whole."""
