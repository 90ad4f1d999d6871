"""Answers to questions of chat benchmarks, and judges of them: a model behind an endpoint, or a reward model."""
