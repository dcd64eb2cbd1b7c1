"""Rewards: named functions from a record and a rollout to a number, or to None if there is no verdict."""
