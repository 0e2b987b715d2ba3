"""The mathematics: levels, noise, kernels, rollout, advantages, credit, allocation, losses, objectives. Torch alone."""
