"""Evaluation: generated tasks, and measurements through the deployed cache path."""
