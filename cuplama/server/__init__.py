"""The HTTP server: endpoints of OpenAI and others, metrics, a web page. Needs the extra ``serve``."""
