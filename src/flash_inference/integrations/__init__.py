"""Other people's interfaces to this library's models: each a folder or a file that nothing else imports."""
