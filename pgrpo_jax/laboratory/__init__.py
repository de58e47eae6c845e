"""Floor 1: a bandit with preference groups that disagree, on which the real estimators and the real objective train in seconds."""
