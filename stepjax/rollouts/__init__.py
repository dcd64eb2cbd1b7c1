"""Rollouts (samples of a model) and the samplers that draw them."""
