"""Benchmarks: questions for a model, scoring of its answers, and reports."""
