"""What every training needs: checkpoints, random draws by name, optimizers, schedules, selection, metrics."""
