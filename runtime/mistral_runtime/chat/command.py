"""The `chat` command: load, then read and answer until the input ends."""

from __future__ import annotations

import signal
import sys
from contextlib import closing

from mistral_runtime.chat.commands import COMMANDS, HELP, Quit, run_command
from mistral_runtime.chat.conversation import Conversation
from mistral_runtime.chat.options import ChatOptions
from mistral_runtime.chat.reading import LineSource, Typed, open_lines, read_message
from mistral_runtime.chat.screen import choose_screen
from mistral_runtime.errors import Interrupted, RequestError
from mistral_runtime.interrupts import Interrupts
from mistral_runtime.prompt import require_template
from mistral_runtime.session import DEFAULT_CHAT_CONTEXT, load_session, open_snapshot
from mistral_runtime.terminal import write_err


def run_chat(options: ChatOptions, interrupts: Interrupts) -> int:
    """Hold a conversation on the standard streams and return the exit code.

    Raises:
        NoChatTemplate: A base model, found before its weights are looked at.
        MistralRuntimeError: Any other failure that has three lines to show.
        Interrupted: A signal while no answer was under way; at a terminal's prompt, the second Ctrl-C in a row.
    """
    snapshot = open_snapshot(options.directory, chat_template=options.chat_template)
    options.clock.mark("snapshot")
    template = require_template(snapshot.template, snapshot.tokenizer)
    options.clock.mark("prompt")
    context = options.context
    if context is None and snapshot.config.context_limit is not None:
        context = min(snapshot.config.context_limit, DEFAULT_CHAT_CONTEXT)
    positions = context or snapshot.config.max_position_embeddings
    loaded = load_session(
        snapshot,
        options.compute,
        positions=positions,
        context=context,
        report=_ignore if options.quiet else write_err,
        clock=options.clock,
    )
    with closing(loaded) as session:
        conversation = Conversation(
            session,
            template,
            options,
            context=context,
            positions=positions,
            interrupts=interrupts,
            screen=choose_screen(is_plain=options.plain),
        )
        source = open_lines(list(COMMANDS), keeps_history=options.keeps_history)
        if not options.quiet:
            write_err(HELP)
        return converse(source, conversation)


def converse(source: LineSource, conversation: Conversation) -> int:
    """Answer until the input ends or /quit. A question that cannot be served ends itself, not the chat."""
    was_cleared = False  # the line before was given up with Ctrl-C
    while True:
        try:
            typed = read_message(source)
            was_cleared = False
            if typed is None:
                return 0
            _respond(typed, conversation)
        except Quit:
            return 0
        except RequestError as error:
            write_err(str(error))
        except Interrupted as error:
            if was_cleared or error.signal_number != signal.SIGINT or not sys.stdin.isatty():
                raise
            was_cleared = True
            write_err("\n(Ctrl-C again or Ctrl-D leaves)")


def _respond(typed: Typed, conversation: Conversation) -> None:
    text = typed.text
    if not typed.is_quoted and text.startswith("/") and not text.startswith("//"):
        run_command(text, conversation)
    elif text:
        conversation.ask(text[1:] if text.startswith("//") and not typed.is_quoted else text)


def _ignore(_text: str) -> None:
    """Show nothing."""
