"""Results that print as rich tables."""


class RichText:
    """Mixin: what rich shows, as text."""

    def to_text(self, width: int = 110) -> str:
        """The same as text, without colours."""
        from rich.console import Console

        console = Console(width=width, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __str__(self) -> str:
        return self.to_text()
