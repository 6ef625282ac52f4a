"use strict";
// The images to click on: a point and a tile each. Names and thumbnails come from the page's data
// and are only ever set as text and as the sources of images.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const SIDE = [720, 480], MARGIN = 28;
let chosen = -1;

function made(tag, parent, content, cls) {
  const element = document.createElement(tag);
  if (content !== undefined) element.textContent = content;
  if (cls) element.className = cls;
  if (parent) parent.append(element);
  return element;
}

function picture(i, parent) {
  const img = made("img", parent);
  img.src = "data:image/jpeg;base64," + data.images[i].jpeg;
  img.alt = data.images[i].name;
  return img;
}

function groupOf(i) {
  const group = data.images[i].group;
  return group < 0 ? { name: "no label", colour: "#999999", shape: 0 } : data.groups[group];
}

function shape(kind, x, y, r) {
  const at = (dx, dy) => (x + r * dx).toFixed(1) + "," + (y + r * dy).toFixed(1);
  if (kind === 0) {
    const dot = document.createElementNS(SVG, "circle");
    for (const [key, value] of [["cx", x], ["cy", y], ["r", r]]) dot.setAttribute(key, value);
    return dot;
  }
  const dot = document.createElementNS(SVG, "polygon");
  const corners = kind === 1 ? [at(0, -1.2), at(1.1, 0.8), at(-1.1, 0.8)]
    : [at(-0.9, -0.9), at(0.9, -0.9), at(0.9, 0.9), at(-0.9, 0.9)];
  dot.setAttribute("points", corners.join(" "));
  return dot;
}

const plane = byId("plane"), dots = [], tiles = [];
const scaled = [0, 1].map((axis) => {
  const values = data.images.map((image) => image.at[axis]);
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  return (v) => MARGIN + ((v - low) / span) * (SIDE[axis] - 2 * MARGIN);
});
const tip = made("div", document.body, undefined, "tip");
tip.hidden = true;

data.images.forEach((image, i) => {
  const group = groupOf(i);
  const dot = shape(group.shape, scaled[0](image.at[0]), SIDE[1] - scaled[1](image.at[1]), 5);
  dot.setAttribute("fill", group.colour);
  dot.setAttribute("class", "dot");
  dot.addEventListener("click", () => choose(i));
  dot.addEventListener("mousemove", (event) => {
    tip.replaceChildren();
    picture(i, tip);
    made("div", tip, image.name, "name");
    made("div", tip, group.name, "soft name");
    tip.hidden = false;
    const room = [window.innerWidth - tip.offsetWidth, window.innerHeight - tip.offsetHeight];
    tip.style.left = Math.max(0, Math.min(event.clientX + 14, room[0] - 4)) + "px";
    tip.style.top = Math.max(0, Math.min(event.clientY + 14, room[1] - 4)) + "px";
  });
  dot.addEventListener("mouseleave", () => { tip.hidden = true; });
  plane.append(dot);
  dots.push(dot);

  const tile = made("button", byId("tiles"), undefined, "tile");
  tile.type = "button";
  tile.title = image.name;
  tile.setAttribute("aria-pressed", "false");
  picture(i, tile);
  tile.addEventListener("click", () => choose(i));
  tiles.push(tile);
});

function choose(i) {
  const panel = byId("panel"), image = data.images[i];
  if (chosen >= 0) tiles[chosen].setAttribute("aria-pressed", "false");
  chosen = i;
  tiles[i].setAttribute("aria-pressed", "true");
  dots.forEach((dot) => dot.classList.remove("chosen", "near"));
  dots[i].classList.add("chosen");
  panel.replaceChildren();
  made("h3", panel, image.name, "name");
  picture(i, made("div", panel, undefined, "first"));
  made("p", panel, groupOf(i).name, "soft name");
  made("p", panel, image.near.length ? "Nearest of the images on this page:" : "No other image.");
  const row = made("div", panel, undefined, "tiles");
  image.near.forEach(([other, cosine]) => {
    dots[other].classList.add("near");
    const tile = made("button", row, undefined, "tile");
    tile.type = "button";
    tile.title = data.images[other].name;
    picture(other, tile);
    made("div", tile, cosine.toFixed(3), "soft");
    tile.addEventListener("click", () => { choose(other); tiles[other].focus(); });
  });
}

const filter = byId("filter");
made("option", filter, "all").value = "";
data.groups.forEach((group, g) => { made("option", filter, group.name).value = String(g); });
filter.addEventListener("change", () => {
  let count = 0;
  data.images.forEach((image, i) => {
    const shown = filter.value === "" || image.group === Number(filter.value);
    tiles[i].hidden = !shown;
    dots[i].classList.toggle("off", !shown);
    count += shown;
  });
  byId("count").textContent = count + " of " + data.images.length + " images";
});
filter.dispatchEvent(new Event("change"));

if (data.groups.length <= data.told_apart) {
  data.groups.forEach((group) => {
    const item = made("li", byId("legend"));
    const sign = document.createElementNS(SVG, "svg"), dot = shape(group.shape, 7, 7, 5);
    sign.setAttribute("aria-hidden", "true");
    dot.setAttribute("fill", group.colour);
    sign.append(dot);
    item.append(sign);
    made("span", item, group.name, "name");
  });
}

// Arrow keys go from tile to tile.
byId("tiles").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const shown = tiles.filter((tile) => !tile.hidden);
  const next = shown[shown.indexOf(document.activeElement) + step];
  if (next) { next.focus(); event.preventDefault(); }
});
