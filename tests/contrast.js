() => {
  // [{text, ratio}] of every text on the page: its colour against what is painted behind the middle of it, by WCAG 2.
  const rgba = (value) => {
    const parts = (value.match(/[\d.]+/g) || []).map(Number);
    return value === "transparent" || value === "none" || parts.length < 3 ? [0, 0, 0, 0] : [...parts.slice(0, 3), parts[3] ?? 1];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a)];
  const light = (color) => {
    const [r, g, b] = color.map((one) => (one /= 255) <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const opacity = (element) => {
    let found = 1;
    for (let at = element; at; at = at.parentElement) found *= Number(getComputedStyle(at).opacity);
    return found;
  };
  const painted = (element) => {
    const style = getComputedStyle(element);
    if (element instanceof SVGGeometryElement) {
      const [r, g, b, a] = rgba(style.fill);
      return [r, g, b, a * Number(style.fillOpacity) * opacity(element)];
    }
    const [r, g, b, a] = rgba(style.backgroundColor);
    return [r, g, b, a * opacity(element)];
  };
  const ratio = (element, color, x, y) => {
    const behind = document.elementsFromPoint(x, y).filter((one) => !(one instanceof SVGTextElement));
    const layers = [];
    for (const one of behind) {
      const layer = painted(one);
      layers.push(layer);
      if (layer[3] >= 1) break;
    }
    const dark = matchMedia("screen and (prefers-color-scheme: dark)").matches;
    let ground = dark ? [18, 18, 18] : [255, 255, 255];
    for (const layer of layers.reverse()) ground = over(layer, ground);
    const [r, g, b, a] = color;
    const [low, high] = [light(over([r, g, b, a * opacity(element)], ground)), light(ground)].sort((one, other) => one - other);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
    const range = document.createRange();
    range.selectNodeContents(texts.currentNode);
    const box = [...range.getClientRects()].find((one) => one.width > 1 && one.height > 1);
    if (!box || element.closest("caption")) continue;
    const style = getComputedStyle(element);
    const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
    found.push({text, ratio: ratio(element, rgba(element instanceof SVGElement ? style.fill : style.color), x, y)});
    const before = getComputedStyle(element, "::before");
    if (before.content !== "none" && before.content !== "normal")
      found.push({text: before.content, ratio: ratio(element, rgba(before.color), x, y)});
  }
  return found;
}
