// A streamed answer: PaCoRe's rounds, the reasoning (folded when the answer begins) and the text.

import { make } from "./elements.js";
import { LiveRounds } from "./live.js";

const ENDS = { length: "cut off at the token limit", stopped: "stopped", tool_calls: "calls a tool" };

export class Answer {
  constructor(index, count) {
    this.content = this.reasoning = "";
    const label = count > 1 ? `Answer ${index + 1}` : "Answer";
    const kind = count > 1 ? "answer several waiting" : "answer waiting";
    this.text = make("div", { class: "text" });
    this.footer = make("footer", { class: "quiet" });
    this.element = make("article", { class: kind, "aria-label": label, "aria-busy": "true" }, this.text, this.footer);
  }

  add({ reasoning_content: reasoning, content }) {
    if (reasoning) {
      if (!this.fold) this.beginReasoning();
      this.reasoning += reasoning;
      write(this.reasoningText, reasoning);
      this.reasoningText.scrollTop = this.reasoningText.scrollHeight;
    }
    if (content) {
      this.endReasoning(true);
      this.content += content;
      write(this.text, content);
      this.element.classList.remove("waiting");
    }
  }

  // Takes a PaCoRe event.
  take(event) {
    if (!this.rounds) {
      this.rounds = new LiveRounds();
      this.element.prepend(this.rounds.element);
    }
    this.rounds.take(event);
    if (event.type === "attempt_failed" && event.is_final && !this.content) {
      this.fold?.remove(); // the next attempt starts its own reasoning
      this.fold = null;
      this.reasoning = "";
    }
  }

  beginReasoning() {
    this.begun = performance.now();
    this.isReasoning = true;
    this.summary = make("summary", { text: "Reasoning\u2026" });
    this.reasoningText = make("div", { class: "text scrolling", tabindex: "0" });
    this.fold = make("details", { class: "reasoning", open: true }, this.summary, this.reasoningText);
    this.text.before(this.fold);
  }

  endReasoning(folds) {
    if (!this.isReasoning) return;
    this.isReasoning = false;
    this.summary.textContent = `Reasoned for ${((performance.now() - this.begun) / 1000).toFixed(1)} s`;
    this.fold.open = !folds;
    this.reasoningText.textContent = this.reasoning.trim();
  }

  end(reason) {
    this.endReasoning(Boolean(this.content));
    this.rounds?.stop();
    this.element.classList.remove("waiting");
    this.element.setAttribute("aria-busy", "false");
    this.text.hidden = !this.content;
    if (ENDS[reason]) this.footer.append(make("span", { text: ENDS[reason] }));
  }
}

// Appends to one text node; thousands of nodes would be slow.
function write(element, text) {
  if (element.lastChild) element.lastChild.appendData(text);
  else element.textContent = text;
}
