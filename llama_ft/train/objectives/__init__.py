"""What is optimised beside the next token: preferences, judged answers, rewards."""
