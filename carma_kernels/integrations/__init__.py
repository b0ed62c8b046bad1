"""CARMA in other people's code: Hugging Face models and trainers, and the published implementation."""
