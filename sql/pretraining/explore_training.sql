-- Each step of the trainings.
SELECT model, step, tokens, loss, learning_rate, gradient_norm FROM training_losses ORDER BY model, step
