"""How the page looks: fonts of the machine, colours with contrast, and as high as the screen."""

from __future__ import annotations

import gradio as gr

_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def theme() -> gr.themes.Base:
    """Gradio's default theme with no font from elsewhere, and where its text has less than 4.5 to 1, darker colours."""
    return gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=_FONTS, font_mono=_MONO, spacing_size="sm", text_size="md"
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
        button_cancel_background_fill_dark="#b91c1c",
        button_cancel_background_fill_hover_dark="#991b1b",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )


# The conversation, its box and its buttons fill the first screen; the settings stand beside it, on a phone below.
CSS = """
.main.fillable { padding: 8px 12px !important; max-width: none !important; }
#page { align-items: stretch; gap: 16px; }
#main { height: calc(100dvh - 16px); flex-wrap: nowrap; gap: 6px; }
#title h1, #settings h2 { font-size: 1.05rem; line-height: 1.4; margin: 2px 0; overflow-wrap: anywhere; }
.notice p { font-size: .85rem; margin: 0; overflow-wrap: anywhere; }
#title, #status, .notice { padding: 0 4px; flex: none; }
#sides { flex: 1 1 0; min-height: 0; flex-wrap: nowrap; align-items: stretch; gap: 12px; }
.side { min-height: 0; height: 100%; flex-wrap: nowrap !important; gap: 2px; }
.side .chat { flex: 1 1 0 !important; min-height: 0 !important; height: auto !important; overflow: hidden !important; }
.side .chat > .wrapper { padding-top: 24px; box-sizing: border-box; }
.side button[aria-label="Clear"] { display: none; }
.side .cost { flex: none; }
.html-container .cost, #status { font-size: .85rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
.html-container .cost { padding: 0 4px; min-height: 2.8em; overflow-wrap: anywhere; }
#ask { flex: none; flex-wrap: nowrap; align-items: end; gap: 8px; }
#ask > * { min-width: 0 !important; }
#ask button { flex: none; padding-left: 14px; padding-right: 14px; }
#settings { max-height: calc(100dvh - 16px); overflow-y: auto; gap: 8px; flex-wrap: nowrap; }
@media (max-width: 767px) {
  #page, #sides { flex-direction: column; flex-wrap: nowrap; }
  #main, #settings { flex: none !important; width: 100%; }
  .side { flex: 1 1 0 !important; height: auto; }
  #settings { max-height: none; }
}
"""

# What Gradio has no setting for: a status that is read aloud, digits on a phone's keyboard, and conversations that keys
# can scroll, each with its model's name.
ON_LOAD = """() => {
    document.getElementById("status")?.setAttribute("role", "status");
    document.querySelector("#seed input, #seed textarea")?.setAttribute("inputmode", "numeric");
    const reach = () => document.querySelectorAll(".chat [role=log]:not([tabindex])").forEach((log) => {
        log.tabIndex = 0;
        const label = log.closest(".chat").querySelector("label");
        log.setAttribute("aria-label", "Conversation with " + (label ? label.textContent.trim() : "the model"));
    });
    reach();
    new MutationObserver(reach).observe(document.getElementById("sides"), {childList: true, subtree: true});
}"""
