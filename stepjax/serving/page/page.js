import { Answer } from "./answer.js";
import { make, viewsOf } from "./elements.js";
import { KeyError, call, events } from "./server.js";

const $ = (id) => document.getElementById(id);
let messages = []; // of the conversation, as the server takes them
let pending = []; // images of the next message: {name, uri, views}
let running = null; // the AbortController of the answer that is being written

async function request(path, body, signal) {
  try {
    return await call(path, body, { key: $("key").value, signal });
  } catch (error) {
    if (error instanceof KeyError) askForKey();
    throw error;
  }
}

function askForKey() {
  $("key-field").hidden = false;
  showSettings(true);
  $("key").focus();
}

async function loadModel() {
  try {
    const list = await (await request("v1/models")).json();
    $("model").textContent = document.title = list.data[0].id;
    choosePacore(list.data[0].pacore?.schedule ?? []);
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = error.message;
  }
}

// PaCoRe -------------------------------------------------------------------------------------------------------------

const PRESETS = { low: "4", medium: "16", high: "32,4" };
let isUnasked = false; // the server goes about in rounds even where nobody asks for them

function choosePacore(schedule) {
  const text = schedule.join(",");
  isUnasked = Boolean(text);
  $("pacore").value = text && (Object.keys(PRESETS).find((name) => PRESETS[name] === text) ?? "custom");
  if ($("pacore").value === "custom") $("schedule").value = schedule.join(", ");
  fitSettings();
}

// What does not apply is out of the way.
function fitSettings() {
  const chosen = $("pacore").value;
  $("schedule-field").hidden = $("schedule").disabled = chosen !== "custom";
  $("samples").disabled = Boolean(chosen);
}

function pacore() {
  const chosen = $("pacore").value;
  if (!chosen) return isUnasked ? { schedule: [] } : undefined;
  return { schedule: chosen === "custom" ? $("schedule").value : chosen };
}

// Images -------------------------------------------------------------------------------------------------------------

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function addFiles(files) {
  for (const file of files) {
    let image, item;
    try {
      image = { name: file.name, uri: await read(file), views: null };
      item = showPending(image);
      image.views = await (await request("stepjax/views", { image: image.uri })).json();
      item.querySelector(".note").replaceWith(viewsOf(image.views, true));
    } catch (error) {
      if (item && error.status === 404) {
        item.querySelector(".note").textContent = image.name; // the model is elsewhere, and so are its views
        continue;
      }
      pending = pending.filter((each) => each !== image);
      item?.remove();
      showError(`${file.name}: ${error.message}`);
    }
  }
}

function showPending(image) {
  const remove = make("button", { type: "button", "aria-label": `Remove ${image.name}`, text: "Remove" });
  const note = image.views ? viewsOf(image.views, false) : make("p", { class: "note quiet", text: "Cutting views\u2026" });
  const item = make("li", {}, make("img", { src: image.uri, alt: image.name }), note, remove);
  remove.onclick = () => {
    pending = pending.filter((each) => each !== image);
    item.remove();
    $("text").focus();
  };
  $("images").append(item);
  pending.push(image);
  return item;
}

// The conversation ---------------------------------------------------------------------------------------------------

function showError(message) {
  $("empty").hidden = true;
  $("chat").append(make("p", { class: "error", role: "alert", text: message }));
  scrollDown(true);
}

// Follows the answer, unless the reader has scrolled up.
function scrollDown(always = false) {
  const chat = $("chat");
  if (always || chat.scrollHeight - chat.scrollTop - chat.clientHeight < 120) chat.scrollTop = chat.scrollHeight;
}

function showQuestion(text, images) {
  $("empty").hidden = true;
  const pictures = make("div", { class: "pictures" });
  for (const image of images) {
    const picture = make("div", { class: "picture" }, make("img", { src: image.uri, alt: "Your image" }));
    if (image.views) picture.append(viewsOf(image.views, false));
    pictures.append(picture);
  }
  const article = make("article", { class: "own", "aria-label": "You" });
  if (images.length) article.append(pictures);
  article.append(make("div", { class: "text", text }));
  $("chat").append(article);
  return article;
}

function numberOf(id) {
  const value = $(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

function requestBody() {
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: numberOf("temperature"),
    top_p: numberOf("top-p"),
    max_tokens: numberOf("max-tokens"),
    n: $("samples").disabled ? 1 : (numberOf("samples") ?? 1),
    pacore: pacore(),
  };
  if ($("thinking").value) body.chat_template_kwargs = { enable_thinking: $("thinking").value === "on" };
  return body;
}

async function ask(text, images) {
  const parts = images.map((image) => ({ type: "image_url", image_url: { url: image.uri } }));
  if (text) parts.push({ type: "text", text });
  const question = showQuestion(text, images);
  const conversation = messages;
  conversation.push({ role: "user", content: parts });

  const body = requestBody();
  const answers = Array.from({ length: body.n }, (_, index) => new Answer(index, body.n));
  const group = make("div", { class: "answers" }, ...answers.map((answer) => answer.element));
  $("chat").append(group);
  scrollDown(true);
  const begin = performance.now();
  let first = null;
  running = new AbortController();
  setRunning(true);
  const clock = setInterval(() => {
    $("status").textContent = `${((performance.now() - begin) / 1000).toFixed(0)} s`;
  }, 1000);
  try {
    for await (const event of events(await request("v1/chat/completions", body, running.signal))) {
      if (event.pacore) answers[0].take(event.pacore);
      else first ??= performance.now();
      for (const choice of event.choices) {
        answers[choice.index].add(choice.delta);
        if (choice.finish_reason) answers[choice.index].end(choice.finish_reason);
      }
      if (event.usage) {
        // With PaCoRe the tokens are those of all calls.
        const seconds = (performance.now() - (answers[0].rounds ? begin : first)) / 1000;
        const { completion_tokens: tokens, prompt_tokens: prompt } = event.usage;
        $("status").textContent =
          `${tokens} tokens, ${(tokens / Math.max(seconds, 0.001)).toFixed(1)} tokens/s, first after ` +
          `${((first - begin) / 1000).toFixed(2)} s; ${answers[0].rounds ? "prompts" : "prompt"} of ${prompt} tokens`;
      }
      scrollDown();
    }
  } catch (error) {
    const isStopped = error.name === "AbortError";
    answers.forEach((answer) => answer.end(isStopped ? "stopped" : ""));
    $("status").textContent = isStopped ? "Stopped." : "";
    if (!isStopped) showError(error.message);
  } finally {
    clearInterval(clock);
    running = null;
    setRunning(false);
  }
  if (conversation !== messages) return; // another chat has begun
  if (answers.every((answer) => !answer.content && !answer.reasoning)) {
    // Nothing came: the question goes back, to be sent again.
    messages.pop();
    if (!answers[0].rounds) {
      group.remove();
      question.remove();
    }
    if (!$("text").value) $("text").value = text;
    images.forEach(showPending);
    return;
  }
  messages.push({ role: "assistant", content: answers[0].content });
  if (answers.length > 1) offerChoice(answers, messages[messages.length - 1]);
}

function offerChoice(answers, message) {
  const name = `choice-${messages.length}`;
  answers.forEach((answer, index) => {
    const radio = make("input", { type: "radio", name });
    radio.checked = index === 0;
    radio.onchange = () => (message.content = answer.content);
    answer.footer.append(make("label", {}, radio, " go on with this one"));
  });
}

// Controls -----------------------------------------------------------------------------------------------------------

function setRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  if (!isRunning && document.activeElement !== $("key")) $("text").focus({ preventScroll: true });
}

function showSettings(isOpen) {
  $("settings").hidden = !isOpen;
  $("settings-toggle").setAttribute("aria-expanded", String(isOpen));
}

function fitText() {
  const text = $("text");
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight + 2}px`;
}

$("settings-toggle").onclick = () => showSettings($("settings").hidden);
$("settings").onsubmit = (event) => event.preventDefault();
$("key").onchange = loadModel;
$("pacore").onchange = fitSettings;
$("stop").onclick = () => running?.abort();
$("text").oninput = fitText;
$("text").onkeydown = (event) => {
  // On a phone the Enter key makes lines.
  const isPhone = matchMedia("(pointer: coarse)").matches;
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isPhone) return;
  event.preventDefault();
  $("composer").requestSubmit();
};
$("new").onclick = () => {
  running?.abort();
  messages = [];
  $("chat").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("status").textContent = "";
  $("text").focus();
};
$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (running || (!text && !pending.length)) return;
  if (!$("settings").checkValidity()) {
    showSettings(true); // what is hidden cannot be complained about
    $("settings").reportValidity();
    return;
  }
  const images = pending;
  pending = [];
  $("images").replaceChildren();
  $("text").value = "";
  fitText();
  ask(text, images);
};
$("file").onchange = () => {
  addFiles([...$("file").files]);
  $("file").value = "";
};
addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) addFiles(files);
});
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  addFiles([...event.dataTransfer.files]);
});

loadModel();
$("text").focus();
