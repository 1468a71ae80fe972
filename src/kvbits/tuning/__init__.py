"""The tuner: measure how much each layer and side can lose, and choose its bits under a budget."""
