// Pieces of the page. Whatever a model or a file says becomes textContent, never HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// One text node grows; thousands would be slow.
export function write(element, text) {
  if (element.lastChild) element.lastChild.appendData(text);
  else element.textContent = text;
}

// What the model sees of an image, by the server's answer.
export function viewsOf(views, isOpen) {
  const count = views.crops.length;
  const crops = count ? `${views.columns} \u00d7 ${views.rows} crops and the whole` : "the whole, no crops";
  const details = make(
    "details",
    { class: "views" },
    make("summary", { text: `What the model sees: ${crops}, ${views.tokens} tokens` }),
  );
  details.open = isOpen;
  const whole = make(
    "figure",
    { class: "whole" },
    make("figcaption", { text: `whole: ${views.global_view.tokens} tokens` }),
    make("img", { src: views.global_view.image, alt: `The whole image of ${views.width} by ${views.height} pixels, squared` }),
  );
  const both = make("div", { class: "both" }, whole);
  if (count) {
    const grid = make("div", { class: "grid" });
    for (const crop of views.crops) {
      grid.append(make("img", { src: crop.image, alt: `Crop in row ${crop.row + 1}, column ${crop.column + 1}` }));
    }
    const caption = make("figcaption", { text: `crops: ${views.crops[0].tokens} tokens each` });
    const figure = make("figure", { class: "crops" }, caption, grid);
    figure.style.setProperty("--columns", views.columns);
    both.append(figure);
  }
  details.append(both);
  return details;
}
