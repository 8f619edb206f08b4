"""From gradients to new weights: parameter groups, clipping, the update, schedules, losses."""
