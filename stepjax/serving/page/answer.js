// One answer as it is written: the thought apart, which folds when the answer begins.

import { make, write } from "./elements.js";
import { Rounds } from "./rounds.js";

export class Answer {
  constructor(index, count) {
    this.content = "";
    this.reasoning = "";
    const label = count > 1 ? `Answer ${index + 1}` : "Answer";
    const kind = count > 1 ? "answer several waiting" : "answer waiting";
    this.element = make("article", { class: kind, "aria-label": label, "aria-busy": "true" });
    this.text = make("div", { class: "text" });
    this.footer = make("footer", { class: "quiet" });
    this.element.append(this.text, this.footer);
  }

  add(delta) {
    if (delta.reasoning_content) {
      if (!this.thought) {
        this.summary = make("summary", { text: "Thinking\u2026" });
        this.thoughtText = make("div", { class: "text", tabindex: "0" });
        this.thought = make("details", { class: "thought" }, this.summary, this.thoughtText);
        this.thought.open = true;
        this.text.before(this.thought);
        this.begin = performance.now();
      }
      this.reasoning += delta.reasoning_content;
      write(this.thoughtText, delta.reasoning_content);
      this.thoughtText.scrollTop = this.thoughtText.scrollHeight;
    }
    if (delta.content) {
      this.endThought(true);
      this.content += delta.content;
      write(this.text, delta.content);
      this.element.classList.remove("waiting");
    }
  }

  // An event of PaCoRe.
  take(event) {
    if (!this.rounds) {
      this.rounds = new Rounds();
      this.element.prepend(this.rounds.element);
    }
    this.rounds.take(event);
    if (event.type === "attempt_failed" && event.is_final && !this.content) this.forgetThought();
  }

  // The final call is tried again.
  forgetThought() {
    this.thought?.remove();
    this.thought = null;
    this.thoughtEnded = false;
    this.reasoning = "";
  }

  endThought(folds) {
    if (!this.thought || this.thoughtEnded) return;
    this.thoughtEnded = true;
    this.summary.textContent = `Thought for ${((performance.now() - this.begin) / 1000).toFixed(1)} s`;
    this.thought.open = !folds;
    this.thoughtText.textContent = this.reasoning.trim();
  }

  end(reason) {
    this.endThought(Boolean(this.content));
    this.rounds?.stop();
    this.element.classList.remove("waiting");
    this.element.setAttribute("aria-busy", "false");
    this.text.hidden = !this.content;
    const notes = { length: "cut off: no tokens left", stopped: "stopped", tool_calls: "calls a tool" };
    if (notes[reason]) this.footer.append(make("span", { text: notes[reason] }));
  }
}
